package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/runtime"
)

// Output on disk: a line per line, "NANOSECONDS o|e TEXT". A file is closed at
// maxLogSize and renamed to .1, .1 to .2, which is dropped: 30 MB a task.
const (
	maxLogSize  = 10 << 20
	logFiles    = 3
	maxLogLine  = 16 << 10 // Docker splits there, too
	logPollTime = 50 * time.Millisecond
)

// copy keeps a stream until it ends. Output that can't be kept is dropped: the
// program must not block for it.
func (l *logWriter) copy(f *os.File, r io.Reader, stderr bool) {
	defer f.Close()
	br := bufio.NewReaderSize(r, maxLogLine)
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			l.write(stderr, bytes.TrimSuffix(line, []byte("\n")), br.Buffered() == 0)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func rotated(path string, i int) string {
	if i == 0 {
		return path
	}
	return path + "." + strconv.Itoa(i)
}

func parseLog(b []byte) (runtime.LogLine, error) {
	at, rest, ok := bytes.Cut(b, []byte(" "))
	ns, err := strconv.ParseInt(string(at), 10, 64)
	if !ok || err != nil || len(rest) < 2 || rest[1] != ' ' || rest[0] != 'o' && rest[0] != 'e' {
		return runtime.LogLine{}, fmt.Errorf("output file has a damaged line")
	}
	return runtime.LogLine{Time: time.Unix(0, ns), Stderr: rest[0] == 'e', Line: bytes.Clone(rest[2:])}, nil
}

// logReader reads the files of a task in order, over rotations.
type logReader struct {
	path string
	f    *os.File
	br   *bufio.Reader
	part []byte // a line whose end is not written yet
}

// openOldest starts at the oldest file there is.
func openOldest(path string) (*logReader, error) {
	r := &logReader{path: path}
	for i := logFiles - 1; i >= 0; i-- {
		if err := r.use(i); err == nil {
			return r, nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return nil, os.ErrNotExist
}

func (r *logReader) use(i int) error {
	f, err := os.Open(rotated(r.path, i))
	if err != nil {
		return err
	}
	if r.f != nil {
		r.f.Close()
	}
	r.f, r.br = f, bufio.NewReaderSize(f, 64<<10)
	return nil
}

// next returns a line, or false when there is none yet.
func (r *logReader) next() ([]byte, bool, error) {
	for {
		b, err := r.br.ReadBytes('\n')
		if err == nil {
			b = append(r.part, b[:len(b)-1]...)
			r.part = nil
			return b, true, nil
		}
		if !errors.Is(err, io.EOF) {
			return nil, false, err
		}
		r.part = append(r.part, b...)
		// At the end of the file that is still written to, wait; after a
		// rotation go on with the one that followed this.
		i, err := r.index()
		if err != nil {
			return nil, false, err
		}
		if i == 0 {
			return nil, false, nil
		}
		if i < 0 {
			i = logFiles // this one is gone: so are all before the oldest
		}
		for i--; i > 0 && !exists(rotated(r.path, i)); i-- {
		}
		if err := r.use(i); err != nil {
			return nil, false, err
		}
	}
}

// index tells which file the open one is now, -1 when it was dropped.
func (r *logReader) index() (int, error) {
	mine, err := r.f.Stat()
	if err != nil {
		return 0, err
	}
	for i := range logFiles {
		if st, err := os.Stat(rotated(r.path, i)); err == nil && os.SameFile(st, mine) {
			return i, nil
		}
	}
	if st, ok := mine.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 && !exists(r.path) {
		return 0, nil // the task was removed: nothing follows
	}
	return -1, nil
}

func (r *logReader) close() {
	if r.f != nil {
		r.f.Close()
	}
}

// Logs implements runtime.Runtime.
func (r *Runtime) Logs(ctx context.Context, id string, o runtime.LogOptions) iter.Seq2[runtime.LogLine, error] {
	return func(yield func(runtime.LogLine, error) bool) {
		if _, err := r.Status(ctx, id); err != nil {
			yield(runtime.LogLine{}, err)
			return
		}
		lr, err := openOldest(r.taskDir(id) + "/" + logFile)
		if err != nil {
			yield(runtime.LogLine{}, err)
			return
		}
		defer lr.close()
		var tail [][]byte
		tailing := o.Tail > 0
		ended := false
		for {
			b, ok, err := lr.next()
			if err != nil {
				yield(runtime.LogLine{}, err)
				return
			}
			if ok && tailing {
				if tail = append(tail, b); len(tail) > o.Tail {
					tail = tail[1:]
				}
				continue
			}
			if ok {
				l, err := parseLog(b)
				if !yield(l, err) {
					return
				}
				continue
			}
			if tailing {
				tailing = false
				for _, b := range tail {
					l, err := parseLog(b)
					if !yield(l, err) {
						return
					}
				}
			}
			if !o.Follow || ended {
				return
			}
			st, err := r.Status(ctx, id)
			// Once more after the end is known: the shim writes all of the
			// output before it tells of the end.
			ended = err != nil || st.State == runtime.Exited
			if !ended {
				select {
				case <-ctx.Done():
					yield(runtime.LogLine{}, ctx.Err())
					return
				case <-time.After(logPollTime):
				}
			}
		}
	}
}
