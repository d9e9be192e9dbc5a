"""Pseudo-labels, one file each: modalities made from others, `nano4m fetch folder derive=[edges,normal]`."""
