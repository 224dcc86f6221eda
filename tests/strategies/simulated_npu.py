"""Ascend NPUs in pure Python: a device `npu` of torch whose tensors are computed on the CPU, and a stand-in for `torch_npu`.

It is stricter than a CPU in what matters: tensors of the host and of a device do not meet, a device has no float64 and no
linear algebra, and what a process group does is done by one named hccl. It changes torch for good, so tests run it in forked
processes (`on_simulated_npus`), which begin at once.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_ranks import Ranks
from npu_operator import npu_fusion_attention
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

BYTES = 64 * 2**30  # memory of a device
ops: Counter[tuple[str, torch.dtype]] = Counter()  # what was computed on the devices
events: list[tuple[Any, ...]] = []  # what else was asked for: devices, process groups, collectives, pinned memory

aten = torch.ops.aten
MOVES = {"copy_", "_to_copy", "to", "set_", "detach", "alias"}  # between devices and dtypes
VIEWS = {"view", "select", "clone", "unsqueeze", "_local_scalar_dense"}
TAKES_HOST_INDICES = {"index", "index_put", "index_put_"}
LOWERED = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "scaled_dot_product_attention")  # by autocast


class NPUTensor(torch.Tensor):
    """A tensor on a simulated device. `host` (same shape and strides) holds its values."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device) -> NPUTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        made.host = host.detach()
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.device}: {self.host}"

    def tolist(self) -> Any:
        return self.host.tolist()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def storage(self) -> Any:
        return self.host.storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = NPUTensor(self.host.clone(), self.device)
            as_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if as_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor of an NPU goes into a file")

    @classmethod
    @torch.inference_mode(False)
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        own = [leaf for leaf in leaves if isinstance(leaf, NPUTensor)]
        _refuse(func, leaves)
        ops[func.overloadpacket.__name__, own[0].dtype] += 1
        if func is aten._fused_sdp_choice.default:
            return int(torch.nn.attention.SDPBackend.MATH.value)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else own[0].device
        if any(argument.name == "generator" for argument in func._schema.arguments):
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{func}: expected a generator of the NPU, found one of the host")
            kwargs = {**kwargs, "generator": npu.generator}
        if func.namespace == "_c10d_functional":
            return _functional_collective(func, *args)
        result = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
        known = {id(leaf.host): leaf for leaf in own}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            return NPUTensor(value, device)

        if func is aten.copy_.default and not isinstance(args[0], NPUTensor):
            return args[0]
        return result if device.type != "npu" else tree_map(wrap, result)


def _functional_collective(func: Any, tensor: NPUTensor, *args: Any) -> torch.Tensor:
    """Those of DTensors."""
    if func is not torch.ops._c10d_functional.all_gather_into_tensor.default:
        assert "wait" in str(func) or "wrap" in str(func), func
        return tensor  # which is there already
    size, group = args
    gathered = torch.empty(size * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    dist.distributed_c10d._resolve_process_group(group).all_gather_single(gathered, tensor.contiguous())
    return gathered


def _to_host(value: Any) -> Any:
    if isinstance(value, NPUTensor):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "npu" else value


def _refuse(func: Any, leaves: list[torch.Tensor]) -> None:
    name = func.overloadpacket.__name__
    if name in MOVES:
        return
    if name not in TAKES_HOST_INDICES and any(leaf.device.type != "npu" and leaf.dim() > 0 for leaf in leaves):
        raise RuntimeError(f"{name}: expected all tensors on one device, found {[str(leaf.device) for leaf in leaves]}")
    if len({leaf.device for leaf in leaves if leaf.device.type == "npu"}) > 1:
        raise RuntimeError(f"{name}: tensors of several NPUs")
    if name not in VIEWS and any(leaf.dtype in (torch.float64, torch.complex128) for leaf in leaves):
        raise RuntimeError(f"{name}: float64 on an NPU")
    if "linalg" in name and "norm" not in name:
        raise RuntimeError(f"{name}: linear algebra on an NPU")


class Event:
    """Of a device where nothing is asynchronous."""

    def record(self, stream: Any = None) -> Event:
        return self


class Stream:
    """See `Event`."""

    def record_event(self, event: Any = None) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)


class SimulatedNPU(types.ModuleType):
    """What `torch.npu` and `torch_npu.npu` are: the names of the real module that are used, with its signatures."""

    def __init__(self, count: int) -> None:
        super().__init__("torch_npu.npu")
        self.count, self.current = count, 0
        self.generator = torch.Generator()

    def device_count(self) -> int:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        return self.count if visible is None else len(visible.split(","))

    def is_available(self) -> bool:
        return self.device_count() > 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return self.current

    def set_device(self, device: Any) -> None:
        self.current = device if isinstance(device, int) else torch.device(device).index
        events.append(("set_device", self.current))

    def get_device_name(self, device_name: Any = None) -> str:
        return "Ascend910B (simulated)"

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        return {"allocated_bytes.all.peak": 7 * 2**20, "allocated_bytes.all.current": 5 * 2**20}

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.memory_stats(device)["allocated_bytes.all.peak"]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return BYTES - 5 * 2**20, BYTES

    def empty_cache(self) -> None:
        events.append(("empty_cache",))

    def Stream(self, priority: int = 0) -> Stream:
        return Stream()

    def Event(self) -> Event:
        return Event()

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> AbstractContextManager[Stream]:
        return nullcontext(stream)

    def synchronize(self, device: Any = None) -> None:
        """Nothing is asynchronous here."""

    def get_rng_state(self, device: Any = "npu") -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = "npu") -> None:
        self.generator.set_state(new_state)

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def is_bf16_supported(self, including_emulation: bool = False) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


npu = SimulatedNPU(0)


def install(count: int = 2) -> types.ModuleType:
    """Makes `torch_npu` importable with `count` devices, in this process and for good; returns it."""
    npu.__init__(count)  # type: ignore[misc]
    _setup_privateuseone_for_python_backend("npu", backend_module=npu)
    torch._C._set_multithreading_enabled(False)  # autograd's thread per device knows of one device only
    torch.accelerator.current_stream = npu.current_stream  # type: ignore[assignment]
    torch.nn.Module._apply = _apply_in_place  # type: ignore[assignment,method-assign]
    torch.distributed.fsdp._fully_shard._fsdp_init._move_states_to_device = _move_in_place
    _register_operators()
    dist.Backend.register_backend("hccl", _hccl, devices=["npu"])
    torch_npu = types.ModuleType("torch_npu")
    torch_npu.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    torch_npu.__version__, torch_npu.npu = torch.__version__.split("+")[0], npu  # type: ignore[attr-defined]
    torch_npu.npu_fusion_attention = npu_fusion_attention  # type: ignore[attr-defined]
    utils = types.ModuleType("torch_npu.npu.utils")
    utils.get_cann_version = {"CANN": "8.5.0", "HCCL": "8.5.0", "DRIVER": "25.2.0"}.get  # type: ignore[attr-defined]
    sys.modules |= {"torch_npu": torch_npu, "torch_npu.npu": npu, "torch_npu.npu.utils": utils}
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[assignment,method-assign]
    return torch_npu


_libraries: list[torch.library.Library] = []


def _register_operators() -> None:
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend([library, fallback])  # they end with their objects

    def on(device: Any) -> torch.device:
        device = torch.device("npu" if device is None else device)
        return device if device.index is not None else torch.device("npu", npu.current)

    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> NPUTensor:
        return NPUTensor(torch.empty(size, dtype=dtype, device="cpu"), on(device))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> NPUTensor:
        return NPUTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), on(device))

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _to_host(target).copy_(_to_host(source))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOWERED:
        library.impl(name, _lowered(getattr(aten, name).default), "AutocastPrivateUse1")


def _lowered(operator: Any) -> Callable[..., Any]:
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("npu")

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def _apply_in_place(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` that keeps parameters the same objects when they move, as torch_npu's tensors allow."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in module._parameters.items():
            applied = parameter if parameter is None else fn(parameter)
            if applied is parameter or parameter is None:
                continue
            if torch._has_compatible_shallow_copy_type(parameter, applied) and not isinstance(parameter, NPUTensor):
                parameter.data = applied
            elif isinstance(applied, NPUTensor):
                _swap(parameter, applied)
            else:  # back on the host: at the end
                module._parameters[name] = torch.nn.Parameter(applied, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else fn(buffer)
    return module


def _swap(parameter: torch.Tensor, value: torch.Tensor) -> None:
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, parameter.requires_grad))


def _move_in_place(parameters: list[Any], buffers: list[Any], device: torch.device) -> None:
    """FSDP2's function for what it shards, which sets `data`."""
    for tensor in (*parameters, *buffers):
        if tensor.device != device:
            _swap(tensor, tensor.detach().to(device))


def _pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    events.append(("pin_memory",))
    return tensor


class HCCL(dist.ProcessGroup):
    """A process group that takes tensors of NPUs only, and lets gloo do the work."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.CUSTOM, self.gloo)
        events.append(("process_group", "hccl", rank, size))

    supports_splitting = False

    def getBackendName(self) -> str:
        return "hccl"

    def _get_backend(self, device: torch.device) -> HCCL:
        assert device.type == "npu"
        return self

    def _run(self, name: str, *args: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if any(not isinstance(tensor, NPUTensor) for tensor in tensors):
            raise RuntimeError(f"hccl {name}: tensors must be on NPUs, found {[str(t.device) for t in tensors]}")
        events.append((name,))
        getattr(self.gloo, name)(*tree_map(_to_host, args)).wait()
        return _Done(args[0])

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        return self._run("_allgather_base", output, input)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Any:
        mean = opts.reduceOp == dist.ReduceOp.AVG
        if mean:
            opts.reduceOp = dist.ReduceOp.SUM
        done = self._run("_reduce_scatter_base", output, input, opts)
        if mean:
            _to_host(output).div_(self.size())
        return done

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # before torch 2.13

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        mean = opts.reduceOp == dist.ReduceOp.AVG
        if mean:
            opts.reduceOp = dist.ReduceOp.SUM
        done = self._run("allreduce", tensors, opts)
        for tensor in tensors if mean else ():
            tensor.host.div_(self.size())
        return done

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._run("broadcast", tensors, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._run("allgather", outputs, inputs)

    def barrier(self, opts: Any = None) -> Any:
        if opts is None or opts.device is None or opts.device.type != "npu":
            raise RuntimeError("hccl barrier: must be told the NPU")
        events.append(("barrier",))
        self.gloo.barrier().wait()
        return _Done([])


class _Done(dist._Work):
    """Work that is finished when it is returned."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self.future


def _hccl(store: Any, rank: int, size: int, timeout: Any) -> HCCL:
    return HCCL(store, rank, size, timeout)


def on_simulated_npus(folder: Path, body: Callable[..., None], *args: Any, processes: int = 1, count: int = 2) -> None:
    """Calls `body(*args)` in forked processes with `count` NPUs each; fails with their tracebacks."""

    def with_npus() -> None:
        install(count)
        body(*args)

    Ranks(folder, with_npus, processes=processes).end(100)
