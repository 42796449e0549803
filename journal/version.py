"""The version, which goes on record with each operation. Written here, so that no start has to look for it."""

VERSION = "0.1.0"
