package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

// maxPending bounds the output that waits to be written while more is coming, bytes.
const maxPending = 64 << 10

// logWriter keeps a task's output. It is the shim's. A disk that refuses it ends
// nothing: lines that can't be kept are counted, and as soon as the disk takes one
// again, which is tried with the next lines and each second, the count is told in their
// place.
type logWriter struct {
	path string
	tell func(error) // why lines are being lost, nil: they are kept again
	most int64       // bytes of a file
	keep int         // files
	mu   sync.Mutex
	f    *os.File // nil: it can't be opened now
	buf  []byte   // whole lines, not written yet
	size int64    // of the file, up to its last whole line
	torn bool     // the file has a part of a line behind size, which could not be cut off
	// lines in buf, and lost since the disk last took one, with why.
	lines, lost int
	why         error
}

// logRetry is how often the disk is asked whether it takes output again.
const logRetry = time.Second

// newLogWriter opens the file, one of so many as c says. tell is called when lines begin to be lost, and when that
// is over; the writer is locked meanwhile.
func newLogWriter(path string, c spec.LogConfig, tell func(error)) (*logWriter, error) {
	l := &logWriter{path: path, tell: tell}
	l.most, l.keep = c.Limits()
	return l, l.open()
}

func (l *logWriter) open() error {
	f, err := durable.Append(l.path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size, l.torn = f, st.Size(), false
	return nil
}

// appendLine adds a line in the form of the file.
func appendLine(b []byte, kind byte, line []byte) []byte {
	b = append(strconv.AppendInt(b, time.Now().UnixNano(), 10), ' ', kind, ' ')
	return append(append(b, line...), '\n')
}

func (l *logWriter) write(stderr bool, line []byte, flush bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kind := byte('o')
	if stderr {
		kind = 'e'
	}
	if at := l.size + int64(len(l.buf)); at > 0 && at+int64(len(line)) > l.most {
		l.rotate()
	}
	l.buf = appendLine(l.buf, kind, line)
	l.lines++
	if flush || len(l.buf) >= maxPending {
		l.put()
	}
}

// put writes what waits. l.mu is held.
func (l *logWriter) put() {
	if len(l.buf) == 0 && l.lost == 0 {
		return
	}
	err, losing := l.try(), l.lost > 0
	switch {
	case err == nil && losing:
		l.lost, l.why = 0, nil
		l.tell(nil)
	case err != nil:
		l.lost += l.lines
		l.why = err
		if !losing {
			l.tell(cause(err))
			time.AfterFunc(logRetry, l.again)
		}
	}
	l.buf, l.lines = l.buf[:0], 0
}

// again asks the disk for as long as it takes nothing.
func (l *logWriter) again() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.put(); l.lost > 0 {
		time.AfterFunc(logRetry, l.again)
	}
}

func (l *logWriter) try() error {
	if l.f == nil {
		if err := l.open(); err != nil {
			return err
		}
	}
	if l.torn {
		if err := l.f.Truncate(l.size); err != nil {
			return err
		}
		l.torn = false
	}
	out := l.buf
	if l.lost > 0 {
		out = append(appendLine(nil, 'e', fmt.Appendf(nil, "[shoal: %d lines of output could not be kept: %v]", l.lost, cause(l.why))), l.buf...)
	}
	n, err := l.f.Write(out)
	if err == nil {
		l.size += int64(n)
		return nil
	}
	// Part of it is no use: the reader takes whole lines.
	if n > 0 {
		l.torn = l.f.Truncate(l.size) != nil
	}
	return err
}

// cause is the error without the path, which says nothing to who reads the output.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// found makes the file anew if somebody removed it.
func (l *logWriter) found() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return
	}
	mine, err := l.f.Stat()
	there, terr := os.Stat(l.path)
	if err == nil && terr == nil && os.SameFile(mine, there) {
		return
	}
	l.f.Close()
	if l.f = nil; l.open() != nil {
		l.size = 0 // the next write tries again
	}
}

func (l *logWriter) rotate() {
	l.put()
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
	if l.keep == 1 {
		_ = os.Remove(l.path)
	}
	for i := l.keep - 1; i > 0; i-- {
		_ = os.Rename(rotated(l.path, i-1), rotated(l.path, i))
	}
	if err := l.open(); err != nil {
		l.size = 0 // the next write tries again
	}
}

func (l *logWriter) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put()
}
