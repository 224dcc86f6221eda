from fixtures_stages import (  # noqa: F401
    cache_of_tests,
    make_data,
    make_stage1,
    make_stage2,
    session_cache,
    teacher_folder,
    tiny_corpus,
    tiny_tokenizer,
)
