"""Raw <-> ids, one file each."""
