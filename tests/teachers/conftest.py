from fixtures_stages import cache_of_tests, session_cache, tiny_tokenizer  # noqa: F401
