"""Arms, one file each: how it is chosen or trained, and what answers the items."""
