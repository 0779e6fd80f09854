// How long helpers look for the next job before they sleep; polymoe/native/library.py says.
#include "threads.h"

extern "C" void polymoe_spin(int64_t microseconds) { polymoe::helpers()->spin_microseconds.store(microseconds); }
