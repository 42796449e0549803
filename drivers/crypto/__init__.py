"""Disk encryption: sectors (`sectors.py`) and the LUKS header that holds their key (`luks.py`). Knows no image format.

Needs cryptography and numpy, which its modules import only when something is encrypted or decrypted."""
