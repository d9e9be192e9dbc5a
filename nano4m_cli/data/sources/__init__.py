"""Sources of raw data, one file each: `nano4m fetch NAME key=value ...`."""
