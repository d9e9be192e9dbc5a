"""Filters of clips, one file each: `nano4m fetch folder filter=[silence,black]`."""
