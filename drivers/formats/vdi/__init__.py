"""VDI, VirtualBox's disk images: dynamic and static ones of version 1.1."""
