"""Pure data: no system call, no file, no import from the rest but errors."""
