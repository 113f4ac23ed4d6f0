#!/bin/sh
set -e
case "$1" in
    configure)
        if [ -d /run/systemd/system ]; then
            systemctl daemon-reload
            # Neither may fail an installation: a container has modules and settings of its host.
            systemctl try-restart systemd-modules-load.service >/dev/null 2>&1 || true
            /lib/systemd/systemd-sysctl /usr/lib/sysctl.d/30-shoal.conf >/dev/null 2>&1 || true
        fi
        if [ -z "$2" ]; then
            # A first installation; what an administrator disabled later stays so.
            deb-systemd-helper enable shoal.service >/dev/null || true
            if [ -d /run/systemd/system ]; then
                deb-systemd-invoke start shoal.service || true
                echo "shoal: the agent runs. Next: 'shoal init' on the first node, 'shoal join …' on the others."
            fi
        elif [ -d /run/systemd/system ]; then
            # Tasks, virtual IPs and names go on meanwhile.
            deb-systemd-invoke try-restart shoal.service || true
        fi
        ;;
esac
