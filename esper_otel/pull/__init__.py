"""Pull: the contract between a gateway and whoever pulls from it, and its clients. It needs no gateway."""
