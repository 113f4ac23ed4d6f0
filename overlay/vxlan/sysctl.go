package vxlan

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// noIPv6 tells whether a setting is moot: the kernel has no IPv6, or the device
// is there and IPv6 is not on it (the kernel leaves devices with an MTU below
// 1280 without, RFC 8200 section 5). Where the device is not there yet nothing
// is known: once it is made it may well have IPv6. Within do.
func noIPv6(o overlay.Sysctl, err error) bool {
	if !errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(o.Name, "net.ipv6.") || !strings.HasSuffix(o.Name, ".disable_ipv6") || o.Value != "1" {
		return false
	}
	if _, err := os.Stat("/proc/sys/net/ipv6/conf"); errors.Is(err, fs.ErrNotExist) {
		return true
	}
	if o.Dev == "" {
		return false
	}
	_, err = nl.Sysctl("net.ipv4.conf." + o.Dev + ".forwarding")
	return err == nil
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
