// Shoal is the one binary: the command line, the node's agent (shoal agent),
// and the helpers that the agent starts for its tasks.
//
// This package is the only place that picks real implementations of what the
// agent takes as interfaces, and the only one that exits the process.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/runtime/container"
	"github.com/shoalnet/shoal/runtime/process"
)

func main() {
	// The helpers of a task are this binary, too: they never come back here.
	if handled, code := process.Dispatch(os.Args); handled {
		os.Exit(code)
	}
	if handled, code := container.Dispatch(os.Args); handled {
		os.Exit(code)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	cancel()
	os.Exit(code)
}

// exitError ends the process with a status and, unless it is silent, a line.
type exitError struct {
	code int
	err  error // nil: the line was printed already, or is not ours
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// run is the whole program but for the process around it.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	c := &cli{in: in, out: out, err: errOut}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	err := unknownCommand(root, args)
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	if err == nil {
		return 0
	}
	var ee *exitError
	if errors.As(err, &ee) {
		if ee.err != nil {
			fmt.Fprintln(errOut, "shoal:", client.Message(ee.err))
		}
		return ee.code
	}
	fmt.Fprintln(errOut, "shoal:", client.Message(err))
	return 1
}

// usageError is a mistake on the command line; it points to the help.
func usageError(cmd *cobra.Command, err error) error {
	return &exitError{code: 2, err: fmt.Errorf("%w\nsee '%s --help'", err, cmd.CommandPath())}
}
