// Which sources a library was built from; polymoe/native/library.py compares. hatch_build.py defines the text.
extern "C" const char* polymoe_sources() { return POLYMOE_SOURCES; }
