#!/bin/sh
set -e
# Of an upgrade postinst tells systemd, which need not look at all its units twice.
if [ "$1" != upgrade ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
case "$1" in
    remove)
        if command -v deb-systemd-helper >/dev/null 2>&1; then
            deb-systemd-helper mask shoal.service >/dev/null || true
        fi
        ;;
    purge)
        # The node leaves its cluster, which ends its tasks and takes down their networks.
        if [ -x /var/lib/shoal/purge/shoal ] && [ -e /var/lib/shoal/node.json ]; then
            SHOAL_AGENT_ARGS=
            if [ -e /var/lib/shoal/purge/default ]; then
                SHOAL_AGENT_ARGS=$(sed -n 's/^SHOAL_AGENT_ARGS=//p' /var/lib/shoal/purge/default | tail -n 1 | tr -d "\"'")
            fi
            # shellcheck disable=SC2086 # several arguments
            /var/lib/shoal/purge/shoal agent $SHOAL_AGENT_ARGS >/var/lib/shoal/purge/log 2>&1 &
            agent=$!
            i=0
            until /var/lib/shoal/purge/shoal info >/dev/null 2>&1 || [ $i -ge 30 ]; do
                kill -0 "$agent" 2>/dev/null || break
                i=$((i + 1))
                sleep 1
            done
            if /var/lib/shoal/purge/shoal info 2>/dev/null | grep -q '^Cluster: *[a-z0-9]'; then
                timeout 90 /var/lib/shoal/purge/shoal leave --force || {
                    echo "shoal: the node's tasks or networks are not all removed:" >&2
                    tail -n 3 /var/lib/shoal/purge/log >&2
                }
            fi
            kill "$agent" 2>/dev/null || true
            wait "$agent" 2>/dev/null || true
        fi
        if command -v deb-systemd-helper >/dev/null 2>&1; then
            deb-systemd-helper purge shoal.service >/dev/null || true
            deb-systemd-helper unmask shoal.service >/dev/null || true
        fi
        rm -rf /var/lib/shoal /run/shoal /etc/shoal
        if getent group shoal >/dev/null; then
            delgroup --quiet --system --only-if-empty shoal >/dev/null 2>&1 || groupdel shoal 2>/dev/null || true
        fi
        ;;
esac
