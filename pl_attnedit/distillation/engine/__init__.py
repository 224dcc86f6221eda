"""How both stages compute: teacher and student layer by layer, gradients in the forward pass, CUDA graphs, sharding."""
