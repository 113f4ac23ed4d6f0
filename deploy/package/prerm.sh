#!/bin/sh
set -e
# An upgrade leaves the agent running until the new one takes over (postinst).
if [ "$1" = remove ]; then
    if [ -d /run/systemd/system ]; then
        deb-systemd-invoke stop shoal.service || true
    fi
    # To purge takes the program, and how it was started: both are gone then.
    if [ -d /var/lib/shoal ] && command -v shoal >/dev/null; then
        mkdir -p /var/lib/shoal/purge
        cp -p /usr/bin/shoal /var/lib/shoal/purge/shoal
        if [ -e /etc/default/shoal ]; then cp -p /etc/default/shoal /var/lib/shoal/purge/default; fi
    fi
    if ls /run/shoal/tasks/* >/dev/null 2>&1; then
        echo "shoal: this node's tasks go on without an agent: install shoal again to have one," >&2
        echo "shoal: or 'apt purge shoal' to stop them and to remove their networks and all data." >&2
    fi
fi
