package container

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

// Dispatch is the init of a container with --init, when the arguments say so: it
// starts the program, passes signals on and reaps what nobody waits for. It is
// called first thing in main.
func Dispatch(args []string) (handled bool, code int) {
	if len(args) < 4 || args[1] != initWord || args[2] != "--" {
		return false, 0
	}
	sigs := make(chan os.Signal, 64)
	signal.Notify(sigs)
	signal.Ignore(syscall.SIGTTIN, syscall.SIGTTOU)
	path, err := exec.LookPath(args[3])
	if err != nil {
		fmt.Fprintf(os.Stderr, "exec: %q: executable file not found in $PATH\n", args[3])
		if errors.Is(err, os.ErrPermission) {
			return true, 126
		}
		return true, 127
	}
	pid, err := syscall.ForkExec(path, args[3:], &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		fmt.Fprintf(os.Stderr, "exec %s: %v\n", args[3], err)
		return true, 126
	}
	for s := range sigs {
		if s != syscall.SIGCHLD {
			if sig, ok := s.(syscall.Signal); ok && sig != syscall.SIGURG { // the Go runtime sends itself SIGURG
				_ = syscall.Kill(pid, sig)
			}
			continue
		}
		for {
			var ws syscall.WaitStatus
			got, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if err == syscall.EINTR {
				continue
			}
			if err != nil || got <= 0 {
				break
			}
			if got == pid {
				if ws.Signaled() {
					return true, 128 + int(ws.Signal())
				}
				return true, ws.ExitStatus()
			}
		}
	}
	return true, 125
}
