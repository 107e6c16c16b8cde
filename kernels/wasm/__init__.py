"""The network as a WebAssembly program for browsers; see README.md."""
