// The products that run on AMX (amx.h): none at these levels.
extern "C" int polymoe_amx() { return 0; }
