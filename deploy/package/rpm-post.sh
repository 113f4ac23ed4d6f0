# $1: 1 an installation, 2 an upgrade. The tasks of an upgraded node go on.
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || :
    if [ "$1" = 1 ]; then systemctl enable --now shoal.service || :; else systemctl try-restart shoal.service || :; fi
fi
