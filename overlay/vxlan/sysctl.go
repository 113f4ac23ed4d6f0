package vxlan

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// noIPv6 tells whether a setting is moot because the kernel has no IPv6.
func noIPv6(o overlay.Sysctl, err error) bool {
	return errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(o.Name, "net.ipv6.") && strings.HasSuffix(o.Name, ".disable_ipv6") && o.Value == "1"
}

// sysctlHolds tells whether a setting is as wanted; within do.
func sysctlHolds(o overlay.Sysctl) (bool, error) {
	v, err := nl.Sysctl(o.Name)
	if noIPv6(o, err) {
		return true, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the device is not there yet
	}
	return v == o.Value, err
}

// setSysctl makes a setting; within do.
func setSysctl(o overlay.Sysctl) error {
	err := nl.SetSysctl(o.Name, o.Value)
	switch {
	case noIPv6(o, err):
		return nil
	case errors.Is(err, fs.ErrNotExist) && o.Dev != "":
		return fmt.Errorf("%s: %w", o.Dev, errNoDevice)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: /proc/sys must be writable for the agent", err)
	}
	return err
}
