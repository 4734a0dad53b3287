"""`baton chaos`: load on a real cluster, faults under it, and a verdict on what clients saw."""
