#!/bin/sh
set -e
# Before the files are there, so that the socket's group is there when the agent starts.
case "$1" in
    install|upgrade)
        if ! getent group shoal >/dev/null; then
            if command -v addgroup >/dev/null 2>&1; then
                addgroup --quiet --system shoal
            else
                groupadd --system shoal
            fi
        fi
        ;;
esac
