"""Disk images: where their bytes live, how a guest disk maps onto them, and how data is moved. Knows no journal."""
