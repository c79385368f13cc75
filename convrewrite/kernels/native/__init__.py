"""The CPU kernel: its C source, and the loader of the library that the package's build makes of it."""
