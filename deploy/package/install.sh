#!/bin/sh
# Installs Shoal from this directory on a machine with systemd, without a package:
#   ./install.sh [--no-start]     install, or upgrade (tasks go on)
#   ./install.sh --uninstall      stop the agent and remove the program; tasks and
#                                 /var/lib/shoal stay: 'shoal leave' before ends them
# PREFIX (default /usr/local) is where the program goes, DESTDIR before all paths.
set -eu
cd "$(dirname "$0")"
prefix=${PREFIX:-/usr/local} dest=${DESTDIR:-} start=1
units=$dest/etc/systemd/system
case "${1:-}" in
    "") ;;
    --no-start) start= ;;
    --uninstall)
        if [ -z "$dest" ] && [ -d /run/systemd/system ]; then systemctl disable --now shoal.service || true; fi
        rm -f "$dest$prefix/bin/shoal" "$units/shoal.service" "$dest$prefix/share/man/man1"/shoal*.1.gz \
            "$dest$prefix/share/bash-completion/completions/shoal" "$dest/usr/lib/sysctl.d/30-shoal.conf" "$dest/usr/lib/modules-load.d/shoal.conf"
        exit 0 ;;
    *) echo "install.sh: unknown argument $1: use --no-start or --uninstall" >&2; exit 2 ;;
esac
if [ -z "$dest" ] && [ "$(id -u)" != 0 ]; then echo "install.sh: run it as root" >&2; exit 1; fi
install -D -m 755 shoal "$dest$prefix/bin/shoal"
install -d "$units"
sed "s#/usr/bin/shoal#$prefix/bin/shoal#" shoal.service > "$units/shoal.service"
[ -e "$dest/etc/default/shoal" ] || install -D -m 644 shoal.default "$dest/etc/default/shoal"
install -D -m 644 sysctl.conf "$dest/usr/lib/sysctl.d/30-shoal.conf"
install -D -m 644 modules-load.conf "$dest/usr/lib/modules-load.d/shoal.conf"
install -D -m 644 completion/shoal "$dest$prefix/share/bash-completion/completions/shoal"
install -d "$dest$prefix/share/man/man1"
install -m 644 man/*.1.gz "$dest$prefix/share/man/man1/"
[ -z "$dest" ] || exit 0
getent group shoal >/dev/null || groupadd --system shoal
if [ -n "$start" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable shoal.service
    systemctl restart shoal.service
    echo "install.sh: the agent runs. Next: 'shoal init' on the first node, 'shoal join …' on the others."
fi
