"""A client of the network block device protocol (https://github.com/NetworkBlockDevice/nbd, doc/proto.md).

`wire` has its numbers and the connection, `handshake` what is negotiated, `client`
requests and replies, `file` the export as a file. A server may be hostile: every length, offset and id is checked
before it is used, and nothing is kept that it merely announces. As in QEMU, there is no time limit on its answers.
"""
