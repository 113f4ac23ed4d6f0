package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// systemctlTime bounds the question whether the machine goes down; an agent that is merely
// restarted waits for it.
const systemctlTime = 2 * time.Second

// stopTime is what the agent asks systemd for when its tasks are to be stopped; it gives
// 90 s otherwise. Those of a database may need it.
const stopTime = 6 * time.Minute

// goesDown tells, once the agent is asked to end, whether that is because the machine goes
// down (systemctl(1): is-system-running says "stopping"), and asks for the time to stop
// tasks then (sd_notify(3): EXTEND_TIMEOUT_USEC). Where there is no systemd nobody can say.
func goesDown(notify string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), systemctlTime)
	defer cancel()
	// Its exit status is not 0 for whatever is not "running".
	if out, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output(); strings.TrimSpace(string(out)) != "stopping" {
		return false
	}
	if notify != "" && os.Setenv("NOTIFY_SOCKET", notify) == nil {
		_, _ = daemon.SdNotify(true, fmt.Sprintf("STOPPING=1\nEXTEND_TIMEOUT_USEC=%d", stopTime.Microseconds()))
	}
	return true
}
