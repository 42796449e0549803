"""How a guest disk maps onto the bytes of a file."""
