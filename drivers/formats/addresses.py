"""Where servers listen, as options name it: QEMU's SocketAddress and its InetSocketAddress. Messages are QEMU's."""

from __future__ import annotations

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.naming import Options
from safeimg.drivers.storage.address import Address, Descriptor, Inet, Unix, Vsock


def take_socket(given: Options) -> Address:
    """Takes all options; `type` says of what kind they are."""
    kind = required(given, "type")
    address: Address
    match kind:
        case "inet":
            return take_inet(given)
        case "unix":
            path = required(given, "path")
            abstract, tight = given.boolean("abstract") or False, given.boolean("tight")
            address = Unix(path, abstract, tight is not False)
        case "vsock":
            address = Vsock(required(given, "cid"), required(given, "port"))
        case "fd":
            address = Descriptor(required(given, "str"))
        case _:
            raise UsageError(f"Parameter 'type' does not accept value '{kind}'")
    refuse_left(given)
    return address


def take_inet(given: Options, prefix: str = "") -> Inet:
    """Takes all options, whose names messages begin with `prefix`."""
    host, port = required(given, "host", prefix), required(given, "port", prefix)
    given.boolean("numeric")
    if (to := given.integer("to")) is not None and not 0 <= to < 1 << 16:
        raise UsageError("Parameter 'to' expects uint16_t")
    ipv4, ipv6 = given.boolean("ipv4"), given.boolean("ipv6")
    keep_alive = given.boolean("keep-alive") or False
    given.boolean("mptcp")
    refuse_left(given, prefix)
    return Inet(host, port, ipv4, ipv6, keep_alive)


def required(given: Options, name: str, prefix: str = "") -> str:
    value = given.text(name)
    if value is None:
        raise UsageError(f"Parameter '{prefix}{name}' is missing")
    return value


def refuse_left(given: Options, prefix: str = "") -> None:
    """`UsageError` if there is an option that nobody took."""
    if given.left is None:
        return
    name, dot, _ = given.left.partition(".")
    if dot:
        raise UsageError(f"Parameters '{prefix}{name}.*' are unexpected")
    raise UsageError(f"Parameter '{prefix}{name}' is unexpected")
