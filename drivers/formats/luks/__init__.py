"""LUKS, encrypted disks: a header of version 1, and the guest disk behind it."""
