"""Pull: the protocol between a gateway and its pullers, and the clients. It does not depend on the gateway's code."""
