"""Services of the machine: files and locks, devices, random numbers, processes, plug-ins, run folders, logging."""
