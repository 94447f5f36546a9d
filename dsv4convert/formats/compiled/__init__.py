"""The codecs in C: ``codecs.c``, the library built from it, and twins of the numpy codecs that call it."""
