"""Raw and token shards: sources write them, tokenize reads and writes them, training loads them."""
