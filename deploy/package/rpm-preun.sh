# $1: 0 a removal. Tasks go on: 'shoal leave' before ends them.
if [ "$1" = 0 ] && [ -d /run/systemd/system ]; then systemctl disable --now shoal.service || :; fi
