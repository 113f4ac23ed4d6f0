package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
)

// tail is the value of --tail, as the API has it.
type tail int32

// Set implements pflag.Value. A negative number is all, as it is for Docker.
func (t *tail) Set(s string) error {
	if s == "all" {
		*t = 0
		return nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case err != nil:
		return errors.New(`want a number of lines, or "all"`)
	case n < 0:
		*t = 0
	case n == 0:
		*t = -1
	default:
		*t = tail(min(n, math.MaxInt32))
	}
	return nil
}

func (t *tail) String() string {
	switch {
	case *t == 0:
		return "all"
	case *t < 0:
		return "0"
	}
	return strconv.Itoa(int(*t))
}

// Type implements pflag.Value.
func (*tail) Type() string { return "lines" }

// logFlags are the flags of logs and svc logs.
type logFlags struct {
	follow, timestamps, details   bool
	prefix                        bool // begin each line with the task's name
	noTaskIDs, noResolve, noTrunc bool
	tail                          tail
	since, until                  string
	labels                        map[string]string // of the service
	names                         map[string]string // of nodes
}

func (lf *logFlags) add(f *pflag.FlagSet) {
	f.BoolVarP(&lf.follow, "follow", "f", false, "go on as more comes")
	f.BoolVarP(&lf.timestamps, "timestamps", "t", false, "begin each line with its time")
	f.VarP(&lf.tail, "tail", "n", "only the last lines of each task: a number, or all")
	f.StringVar(&lf.since, "since", "", "only lines since then: how long ago, like 10m, or a moment, like 2006-01-02T15:04:05 or seconds since 1970")
	f.StringVar(&lf.until, "until", "", "only lines until then, in the same forms; ends --follow")
	f.BoolVar(&lf.details, "details", false, "show the task's labels in each line")
}

func (lf *logFlags) options(cmd *cobra.Command) (o client.LogOptions, err error) {
	now := time.Now()
	if o.Since, err = moment(lf.since, now); err != nil {
		return o, usageError(cmd, fmt.Errorf("--since: %w", err))
	}
	if o.Until, err = moment(lf.until, now); err != nil {
		return o, usageError(cmd, fmt.Errorf("--until: %w", err))
	}
	o.Follow, o.Tail = lf.follow, int32(lf.tail)
	return o, nil
}

// logTime is the form of Docker's --timestamps: nine places, in UTC.
const logTime = "2006-01-02T15:04:05.000000000Z"

// line is one line as it is shown.
func (lf *logFlags) line(t *shoalv1.Task, m *shoalv1.LogsResponse) []byte {
	var b []byte
	if lf.timestamps {
		b = append(time.Unix(0, m.AtNs).UTC().AppendFormat(b, logTime), ' ')
	}
	if lf.prefix {
		b = fmt.Appendf(b, "%s@%s | ", lf.taskName(t), cmp.Or(lf.node(t.Node), t.Node))
	}
	if lf.details {
		b = append(append(b, details(lf.labels, t.GetSpec().GetLabels())...), ' ')
	}
	return append(append(b, m.Line...), '\n')
}

func (lf *logFlags) node(id string) string {
	if lf.noResolve {
		return id
	}
	return lf.names[id]
}

func (lf *logFlags) taskName(t *shoalv1.Task) string {
	name := t.Name
	if t.Service == "" {
		if lf.noResolve {
			return t.Id
		}
		return name
	}
	if lf.noResolve {
		name = fmt.Sprintf("%s.%d.%s", t.Service, t.Slot, t.Id)
	}
	if i := strings.LastIndexByte(name, '.'); lf.noTaskIDs && i > 0 {
		name = name[:i]
	}
	return name
}

// details are labels as Docker's --details shows them: KEY=VALUE,… with what would
// be taken for a separator escaped.
func details(maps ...map[string]string) string {
	all := map[string]string{}
	for _, m := range maps {
		for k, v := range m {
			all[k] = v
		}
	}
	var out []string
	for k, v := range all {
		out = append(out, url.QueryEscape(k)+"="+url.QueryEscape(v))
	}
	slices.Sort(out)
	return strings.Join(out, ",")
}

func (c *cli) logsCmd() *cobra.Command {
	lf := &logFlags{}
	cmd := &cobra.Command{Use: "logs [flags] TASK", Short: "Show the output of a task", Args: exactly(1),
		Long: `Logs shows what a task wrote, on whichever node it is, or was: TASK is a name, an
ID, or SERVICE.SLOT for a replica. With -f it goes on until the task has ended, also
while its agent is started anew.`,
		Example: `  shoal logs -f --tail 10 c1
  shoal logs -t --since 10m --until 5m web.1
  shoal logs --since 2026-01-02T15:04:05 c1`,
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := lf.options(cmd)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			for again := true; ; again = false {
				t, err := c.runningTask(ctx, args[0])
				if err != nil {
					if _, wire := err.(*connect.Error); !wire {
						if t = c.api().FindAnywhere(ctx, args[0]); t != nil {
							err = nil
						}
					}
					if err != nil {
						return c.pointTo(ctx, args[0], err, "use 'shoal svc logs NAME'")
					}
				}
				err = c.api().TaskLogs(ctx, t, o, c.logSink(lf))
				if again && errors.Is(err, client.ErrOutputGone) && args[0] != t.Id && args[0] != t.Name {
					continue // SERVICE.SLOT is another by now
				}
				return untilStopped(ctx, err)
			}
		}}
	lf.add(cmd.Flags())
	return cmd
}

func (c *cli) svcLogs() *cobra.Command {
	lf := &logFlags{}
	var raw bool
	cmd := &cobra.Command{Use: "logs [flags] SERVICE|TASK", Short: "Show the output of a service's tasks, or of one task", Args: exactly(1),
		Long: `Logs shows what the tasks of a service wrote, by time, or what one task did. With -f
it goes on with all the tasks that come, by scale, update or restart, until the service
is removed.`,
		Example: `  shoal svc logs -f web
  shoal svc logs -f --tail 0 --raw web
  shoal svc logs -t --since 10m --no-task-ids web`,
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := lf.options(cmd)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			lf.prefix = !raw
			svc, t, err := c.api().ServiceOrTask(ctx, args[0])
			if err != nil {
				return err
			}
			if t != nil {
				return untilStopped(ctx, c.api().TaskLogs(ctx, t, o, c.logSink(lf)))
			}
			lf.labels = svc.GetSpec().GetLabels()
			sink := c.logSink(lf)
			if lf.follow {
				return untilStopped(ctx, c.api().ServiceLogs(ctx, svc.Id, svc.GetSpec().GetName(), o, sink))
			}
			type entry struct {
				t *shoalv1.Task
				m *shoalv1.LogsResponse
			}
			var all []entry
			show := sink.Line
			sink.Line = func(t *shoalv1.Task, m *shoalv1.LogsResponse) {
				all = append(all, entry{t, &shoalv1.LogsResponse{AtNs: m.AtNs, Stderr: m.Stderr, Line: slices.Clone(m.Line)}})
			}
			err = c.api().ServiceLogs(ctx, svc.Id, svc.GetSpec().GetName(), o, sink)
			slices.SortStableFunc(all, func(a, b entry) int { return cmp.Compare(a.m.AtNs, b.m.AtNs) })
			for _, e := range all {
				show(e.t, e.m)
			}
			return untilStopped(ctx, err)
		}}
	f := cmd.Flags()
	lf.add(f)
	f.BoolVar(&raw, "raw", false, "without the tasks' names")
	f.BoolVar(&lf.noTaskIDs, "no-task-ids", false, "name replicas SERVICE.SLOT, without the task's ID")
	f.BoolVar(&lf.noResolve, "no-resolve", false, "show IDs of services and nodes, not names")
	f.BoolVar(&lf.noTrunc, "no-trunc", false, "show IDs whole, as they always are here")
	return cmd
}

// logSink prints output, standard error as such. That it can't be written ends the
// process, as nobody reads it.
func (c *cli) logSink(lf *logFlags) client.LogSink {
	return client.LogSink{
		Line: func(t *shoalv1.Task, m *shoalv1.LogsResponse) {
			if lf.prefix && lf.names[t.Node] == "" && !lf.noResolve {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				if _, m, err := c.nodes(ctx); err == nil {
					lf.names = m
				}
				cancel()
			}
			w := c.out
			if m.Stderr {
				w = c.err
			}
			_, _ = w.Write(lf.line(t, m))
		},
		Note: func(t *shoalv1.Task, text string) {
			if t != nil {
				text = "task " + t.Name + ": " + text
			}
			fmt.Fprintln(c.err, "shoal:", text)
		},
	}
}

// untilStopped makes of the end that the user asked for no error.
func untilStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
