package proc

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/runtime"
)

// Output on disk: a line per line, "NANOSECONDS o|e TEXT". The files are
// numbered on; when one has reached maxLogSize the next is begun and the oldest
// beyond logFiles removed: 30 MB a task. A reader of file N goes on with N+1,
// or with the oldest there is.
const (
	maxLogSize  = 10 << 20
	logFiles    = 3
	maxLogLine  = 16 << 10 // Docker splits there, too
	logPollTime = 50 * time.Millisecond
)

func logPath(dir string, n int) string {
	return filepath.Join(dir, logFile+"."+strconv.Itoa(n))
}

// logNumbers lists the output files there are, oldest first.
func logNumbers(dir string) ([]int, error) {
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range es {
		if s, ok := strings.CutPrefix(e.Name(), logFile+"."); ok {
			if n, err := strconv.Atoi(s); err == nil && n > 0 {
				out = append(out, n)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// logWriter keeps a task's output. It is the shim's.
type logWriter struct {
	dir string
	max int64 // bytes per file

	mu   sync.Mutex
	n    int
	f    *os.File
	size int64 // of what is whole in f
	buf  []byte
	lost int   // lines not kept since the last that was
	err  error // why
}

func newLogWriter(dir string, maxSize int64) (*logWriter, error) {
	ns, err := logNumbers(dir)
	if err != nil {
		return nil, err
	}
	l := &logWriter{dir: dir, max: maxSize}
	if len(ns) > 0 {
		l.n = ns[len(ns)-1]
	}
	return l, l.next()
}

// next begins another file.
func (l *logWriter) next() error {
	f, err := os.OpenFile(logPath(l.dir, l.n+1), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if l.f != nil {
		l.f.Close()
	}
	l.f, l.size = f, 0
	l.n++
	if old := l.n - logFiles; old > 0 {
		_ = os.Remove(logPath(l.dir, old))
	}
	return nil
}

// copy keeps a stream until it ends. Output that can't be kept is dropped and
// counted: the program must not block for it.
func (l *logWriter) copy(r io.ReadCloser, stderr bool) {
	defer r.Close()
	br := bufio.NewReaderSize(r, maxLogLine)
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			// A burst is written at once, what comes alone at once, too.
			l.write(time.Now(), stderr, bytes.TrimSuffix(line, []byte("\n")), br.Buffered() == 0)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			l.flush()
			return
		}
	}
}

func (l *logWriter) write(at time.Time, stderr bool, line []byte, flush bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(l.buf)) >= l.max {
		l.flushLocked()
		if l.size >= l.max {
			if err := l.next(); err != nil {
				l.drop(1, err)
				return
			}
		}
	}
	if l.lost > 0 && len(l.buf) == 0 {
		l.append(at, true, fmt.Appendf(nil, "shoal: %d lines of output were lost: %v", l.lost, l.err))
	}
	l.append(at, stderr, line)
	if flush || len(l.buf) >= 64<<10 {
		l.flushLocked()
	}
}

func (l *logWriter) append(at time.Time, stderr bool, line []byte) {
	kind := " o "
	if stderr {
		kind = " e "
	}
	l.buf = strconv.AppendInt(l.buf, at.UnixNano(), 10)
	l.buf = append(l.buf, kind...)
	l.buf = append(l.buf, line...)
	l.buf = append(l.buf, '\n')
}

func (l *logWriter) drop(lines int, err error) { l.lost, l.err = l.lost+lines, err }

func (l *logWriter) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flushLocked()
}

// flushLocked writes what is kept back, whole lines or none: a full disk must
// not leave half a line in the way of the next.
func (l *logWriter) flushLocked() {
	if len(l.buf) == 0 {
		return
	}
	lines := bytes.Count(l.buf, []byte("\n"))
	if _, err := l.f.Write(l.buf); err != nil {
		_ = l.f.Truncate(l.size)
		if l.lost > 0 {
			lines-- // the notice
		}
		l.drop(lines, err)
	} else {
		l.size += int64(len(l.buf))
		l.lost = 0
	}
	l.buf = l.buf[:0]
}

func (l *logWriter) close() {
	l.flush()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.f.Close()
}

// parseLog reads a line of an output file.
func parseLog(b []byte) (runtime.LogLine, bool) {
	at, rest, ok := bytes.Cut(b, []byte(" "))
	ns, err := strconv.ParseInt(string(at), 10, 64)
	if !ok || err != nil || len(rest) < 2 || rest[1] != ' ' || rest[0] != 'o' && rest[0] != 'e' {
		return runtime.LogLine{}, false
	}
	return runtime.LogLine{Time: time.Unix(0, ns), Stderr: rest[0] == 'e', Line: rest[2:]}, true
}

// logReader reads the files of a task in order, over rotations.
type logReader struct {
	dir  string
	n    int // file f is
	f    *os.File
	br   *bufio.Reader
	part []byte // a line whose end is not written yet
	last bool   // f is complete: there is a later one
}

// advance opens the first file after the current one. It returns false when
// there is none.
func (r *logReader) advance() (bool, error) {
	for {
		ns, err := logNumbers(r.dir)
		if err != nil {
			return false, err
		}
		i, _ := slices.BinarySearch(ns, r.n+1)
		if i == len(ns) {
			return false, nil
		}
		f, err := os.Open(logPath(r.dir, ns[i]))
		if errors.Is(err, os.ErrNotExist) {
			continue // rotated away meanwhile
		}
		if err != nil {
			return false, err
		}
		r.close()
		r.n, r.f, r.br, r.part, r.last = ns[i], f, bufio.NewReaderSize(f, 64<<10), nil, false
		return true, nil
	}
}

// next returns a line, or false when there is none yet.
func (r *logReader) next() ([]byte, bool, error) {
	for {
		if r.f == nil {
			if ok, err := r.advance(); !ok || err != nil {
				return nil, false, err
			}
		}
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
		if !r.last {
			// Is this the end of the file that is written to? Once there is a
			// later one this one is complete, and must be read to its end again.
			ns, err := logNumbers(r.dir)
			if err != nil {
				return nil, false, err
			}
			if len(ns) == 0 || ns[len(ns)-1] <= r.n {
				return nil, false, nil
			}
			r.last = true
			continue
		}
		if ok, err := r.advance(); !ok || err != nil {
			return nil, false, err
		}
	}
}

func (r *logReader) close() {
	if r.f != nil {
		r.f.Close()
		r.f = nil
	}
}

// Logs implements runtime.Runtime. Following looks for more every 50 ms: the
// shim has no part in it, so that a reader can't slow the program down.
func (r *Runtime) Logs(ctx context.Context, id string, o runtime.LogOptions) iter.Seq2[runtime.LogLine, error] {
	return func(yield func(runtime.LogLine, error) bool) {
		if _, err := r.get(id); err != nil {
			yield(runtime.LogLine{}, err)
			return
		}
		lr := &logReader{dir: r.taskDir(id)}
		defer lr.close()
		var tail []runtime.LogLine
		tailing := o.Tail > 0
		ended := false
		for {
			b, ok, err := lr.next()
			if errors.Is(err, os.ErrNotExist) { // removed meanwhile
				err, ok, ended = nil, false, true
			}
			if err != nil {
				yield(runtime.LogLine{}, fmt.Errorf("output of task %s: %w", id, err))
				return
			}
			if ok {
				l, whole := parseLog(b)
				switch {
				case !whole: // damaged by a crash of the machine
				case tailing:
					if tail = append(tail, l); len(tail) > o.Tail {
						tail[0] = runtime.LogLine{}
						tail = tail[1:]
					}
				case !yield(l, nil):
					return
				}
				if err := ctx.Err(); err != nil {
					yield(runtime.LogLine{}, err)
					return
				}
				continue
			}
			if tailing {
				tailing = false
				for _, l := range tail {
					if !yield(l, nil) {
						return
					}
				}
				tail = nil
			}
			if !o.Follow || ended {
				return
			}
			// Once more after the end is known: the shim writes all of the
			// output before it tells of the end.
			if st, err := r.Status(ctx, id); err != nil || st.State == runtime.Exited {
				ended = true
				continue
			}
			t := time.NewTimer(logPollTime)
			select {
			case <-ctx.Done():
				t.Stop()
				yield(runtime.LogLine{}, ctx.Err())
				return
			case <-t.C:
			}
		}
	}
}
