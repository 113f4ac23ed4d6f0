package vxlan

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	vnl "github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// Watch calls wake when something may have changed in the namespaces that Observe
// reads, with where, until ctx ends. What it doesn't notice, the next pass does. Being a hint,
// it gives up with a log line where the kernel refuses it.
//
// Without Notices it hears of devices in the host's namespace only: a network's
// way out goes with its namespace, so that this tells of most deletions by hand.
func (d *Dataplane) Watch(ctx context.Context, wake func([]overlay.Change)) {
	watch := func(ctx context.Context) error {
		return d.watch(ctx, func() { wake([]overlay.Change{{}}) })
	}
	if d.cfg.Notices != nil {
		watch = func(ctx context.Context) error {
			return d.cfg.Notices.Run(ctx, func(changes []nl.Change) {
				out := make([]overlay.Change, len(changes))
				for i, c := range changes {
					out[i] = overlay.Change(c)
				}
				wake(out)
			})
		}
	}
	for ctx.Err() == nil {
		err := watch(ctx)
		if ctx.Err() != nil {
			return
		}
		d.log.Warn("watching the kernel failed: changes made by hand are noticed with the next pass only", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
		}
	}
}

// watchPoll bounds how long Watch outlives its context.
const watchPoll = 200 * time.Millisecond

func (d *Dataplane) watch(ctx context.Context, wake func()) error {
	f, err := nl.Open(d.cfg.HostNetns)
	if err != nil {
		return err
	}
	s, err := vnl.SubscribeAt(f, netns.None(), unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	f.Close()
	if err != nil {
		return err
	}
	defer s.Close()
	tv := unix.NsecToTimeval(int64(watchPoll))
	if err := s.SetReceiveTimeout(&tv); err != nil {
		return err
	}
	for ctx.Err() == nil {
		msgs, _, err := s.Receive()
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			wake() // some notices were lost
			continue
		case err != nil:
			return err
		}
		for _, m := range msgs {
			if m.Header.Type != unix.RTM_DELLINK && m.Header.Type != unix.RTM_NEWLINK {
				continue
			}
			h := unix.NlMsghdr{Len: m.Header.Len, Type: m.Header.Type, Flags: m.Header.Flags, Seq: m.Header.Seq, Pid: m.Header.Pid}
			l, err := netlink.LinkDeserialize(&h, m.Data)
			if err == nil && strings.HasPrefix(l.Attrs().Name, overlay.HostPrefix) {
				wake()
				break
			}
		}
	}
	return ctx.Err()
}
