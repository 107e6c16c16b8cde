#!/bin/sh
# Prints the first usable Python for the Makefile, preferring versions that the tests are run with.
for python in python3.12 python3.13 python3.11 python3 python; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$python"
        exit
    fi
done
echo "No Python 3.11 or newer with the venv module was found on the PATH." >&2
echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv) and run make again." >&2
exit 1
