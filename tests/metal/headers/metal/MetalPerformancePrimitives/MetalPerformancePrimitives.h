// Empty: the emulator includes runtime/msl.h, the check headers/msl_check.h.
