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
	"github.com/shoalnet/shoal/spec"
)

// Output on disk: a line per line, "NANOSECONDS o|e TEXT". A file is closed at the size
// that the task's spec.LogConfig gives and renamed to .1, .1 to .2, and so on; the last
// is dropped.
const (
	maxLogLine  = spec.MaxLogLine
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

// files yields the numbers of the files that there are. One may be missing in the row, of
// which another is being made of it.
func files(path string) iter.Seq2[int, os.FileInfo] {
	return func(yield func(int, os.FileInfo) bool) {
		for i, missing := 0, 0; i < spec.MaxLogFiles && missing < 2; i++ {
			st, err := os.Stat(rotated(path, i))
			if err != nil {
				missing++
				continue
			}
			if missing = 0; !yield(i, st) {
				return
			}
		}
	}
}

// oldest is the number of the oldest file, 0 also if there is none.
func oldest(path string) (n int) {
	for i := range files(path) {
		n = i
	}
	return n
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
	at   int64  // of what is read
	part []byte // a line whose end is not written yet
	long bool   // it is too long to be one
}

// openOldest starts at the oldest file there is.
func openOldest(path string) (*logReader, error) {
	r := &logReader{path: path}
	for i := oldest(path); i >= 0; i-- {
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
	r.f, r.br, r.at = f, bufio.NewReaderSize(f, 64<<10), 0
	return nil
}

// next returns a line, or false when there is none yet; a note tells of what is
// lost before it. A line that is longer than any that is written is skipped.
func (r *logReader) next() (line []byte, note string, ok bool, err error) {
	for {
		b, err := r.br.ReadSlice('\n')
		r.at += int64(len(b))
		if len(r.part)+len(b) > maxLogLine+64 {
			r.part, r.long = nil, true
		} else if !r.long {
			r.part = append(r.part, b...)
		}
		if err == nil {
			line, long := r.part, r.long
			if r.part, r.long = nil, false; long {
				return nil, "a damaged line is left out", true, nil
			}
			return line[:len(line)-1], "", true, nil
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if !errors.Is(err, io.EOF) {
			return nil, "", false, err
		}
		// At the end of the file that is still written to, wait; after a
		// rotation go on with the one that followed this.
		i, err := r.index()
		if err != nil {
			return nil, "", false, err
		}
		if i == 0 {
			if st, err := r.f.Stat(); err == nil && st.Size() < r.at {
				// What is written from now on comes behind what is left.
				if _, err := r.f.Seek(st.Size(), io.SeekStart); err != nil {
					return nil, "", false, err
				}
				r.br.Reset(r.f)
				r.at, r.part, r.long = st.Size(), nil, false
				return nil, "the output was cut: some of it may be missing", true, nil
			}
			return nil, "", false, nil
		}
		if i < 0 {
			i = oldest(r.path) + 1 // this one is gone: so are all before the oldest
		}
		for i--; i > 0 && !exists(rotated(r.path, i)); i-- {
		}
		if err := r.use(i); err != nil {
			return nil, "", false, err
		}
	}
}

// index tells which file the open one is now, -1 when it was dropped.
func (r *logReader) index() (int, error) {
	mine, err := r.f.Stat()
	if err != nil {
		return 0, err
	}
	for i, st := range files(r.path) {
		if os.SameFile(st, mine) {
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
		var tail []runtime.LogLine
		tailing := o.Tail != 0
		ended, damaged := false, false
		for {
			b, note, ok, err := lr.next()
			if err != nil {
				yield(runtime.LogLine{}, err)
				return
			}
			if ok {
				var l runtime.LogLine
				if note == "" {
					if l, err = parseLog(b); err != nil {
						note = "a damaged line is left out"
					}
				}
				if l.Note = note; note != "" {
					if damaged { // once for a row of them
						continue
					}
					damaged, l.Time = true, time.Now()
				} else if damaged = false; !o.Since.IsZero() && l.Time.Before(o.Since) {
					continue
				} else if !o.Until.IsZero() && l.Time.After(o.Until) {
					if o.Follow && !tailing {
						return
					}
					continue
				}
				if tailing {
					if tail = append(tail, l); len(tail) > max(o.Tail, 0) {
						tail = tail[1:]
					}
				} else if !yield(l, nil) {
					return
				}
				continue
			}
			tailing = false
			for _, l := range tail {
				if !yield(l, nil) {
					return
				}
			}
			tail = nil
			if !o.Follow || ended || !o.Until.IsZero() && time.Now().After(o.Until) {
				return
			}
			st, err := r.Status(ctx, id)
			// Once more after the end is known: the shim writes all of the
			// output before it tells of the end.
			if ended = err != nil || st.State == runtime.Exited; ended {
				continue
			}
			select {
			case <-ctx.Done():
				yield(runtime.LogLine{}, ctx.Err())
				return
			case <-r.ctx.Done():
				yield(runtime.LogLine{}, runtime.ErrClosing)
				return
			case <-time.After(logPollTime):
			}
		}
	}
}
