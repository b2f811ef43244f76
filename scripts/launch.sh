# Sourced by scripts/serve, scripts/pipeline and scripts/test: finds a Python that is new enough and hands over to scripts/bootstrap.
# Everything that can be decided in Python is decided there; this file only has to run on any POSIX shell.

scripts=$(cd "$(dirname "$0")" && pwd -P) || exit 1

for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        exec "$candidate" "$scripts/launch.py" "$@"
    fi
done

echo "scripts/$1: needs Python 3.11 or newer, and none was found on the PATH." >&2
echo "  Cure: install it (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python)," >&2
echo "  or say where it is: PYTHON=/path/to/python3 scripts/$1" >&2
exit 1
