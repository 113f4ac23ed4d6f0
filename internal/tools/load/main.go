// Load asks a whoami server, and prints what happened as JSON:
//
//	load -n 300 http://web/
//	load -rate 50 -for 20s -timeout 1s http://web/
//	load -n 100 udp://web:9000
//	load -n 100 tcp://web:9000
//
// Every request resolves the name, makes a connection of its own and ends it; with
// -keepalive, of HTTP, it takes one that is idle where there is any.
// Requests are bounded in number and time. SIGINT and SIGTERM end it early; it
// prints all the same.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Result is what is printed.
type Result struct {
	Requests int            `json:"requests"`
	OK       int            `json:"ok"`
	Failed   int            `json:"failed"`
	Hosts    map[string]int `json:"hosts"`   // answers by server
	Clients  map[string]int `json:"clients"` // client addresses that the servers saw
	Errors   map[string]int `json:"errors"`  // by text
	// Seconds from the start to the beginning of the first and the last failed
	// request, -1 without one.
	FirstFailure float64   `json:"first_failure"`
	LastFailure  float64   `json:"last_failure"`
	Failures     []float64 `json:"failures,omitempty"` // beginnings of failed requests, seconds, at most 1,000
	P50          float64   `json:"p50_ms"`
	P99          float64   `json:"p99_ms"`
	Seconds      float64   `json:"seconds"`
	Started      time.Time `json:"started"`
}

const maxRequests = 1_000_000

func main() {
	n := flag.Int("n", 0, "requests (0: as many as -for allows)")
	rate := flag.Float64("rate", 0, "requests a second, begun on time whatever the others do (0: one after another)")
	length := flag.Duration("for", 0, "end after this time (0: when -n are done)")
	timeout := flag.Duration("timeout", 2*time.Second, "of one request")
	keep := flag.Bool("keepalive", false, "keep connections for further requests")
	flag.Parse()
	if err := run(flag.Args(), *n, *rate, *length, *timeout, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(args []string, n int, rate float64, length, timeout time.Duration, keep bool) error {
	if len(args) != 1 {
		return errors.New("want one URL: http://HOST/, udp://HOST:PORT or tcp://HOST:PORT")
	}
	u, err := url.Parse(args[0])
	if err != nil {
		return err
	}
	if n <= 0 && length <= 0 {
		return errors.New("give -n or -for: a load has an end")
	}
	if n <= 0 || n > maxRequests {
		n = maxRequests
	}
	ask, err := asker(u, keep)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if length > 0 {
		ctx, cancel = context.WithTimeout(ctx, length)
		defer cancel()
	}
	r := &Result{Hosts: map[string]int{}, Clients: map[string]int{}, Errors: map[string]int{}, FirstFailure: -1, LastFailure: -1, Started: time.Now()}
	var mu sync.Mutex
	var lat []float64
	one := func() {
		begun := time.Since(r.Started).Seconds()
		start := time.Now()
		// A request that was begun is finished, even when the time is up.
		rctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		a, err := ask(rctx)
		mu.Lock()
		defer mu.Unlock()
		r.Requests++
		if err != nil {
			r.Failed++
			r.Errors[short(err)]++
			if r.FirstFailure < 0 || begun < r.FirstFailure {
				r.FirstFailure = begun
			}
			r.LastFailure = max(r.LastFailure, begun)
			if len(r.Failures) < 1000 {
				r.Failures = append(r.Failures, begun)
			}
			return
		}
		r.OK++
		lat = append(lat, float64(time.Since(start).Microseconds())/1000)
		r.Hosts[a.Host]++
		if h, _, err := net.SplitHostPort(a.Client); err == nil {
			r.Clients[h]++
		}
	}
	if rate > 0 {
		var wg sync.WaitGroup
		t := time.NewTicker(time.Duration(float64(time.Second) / rate))
	loop:
		for range n {
			wg.Go(one)
			select {
			case <-ctx.Done():
				break loop
			case <-t.C:
			}
		}
		t.Stop()
		wg.Wait()
	} else {
		for i := 0; i < n && ctx.Err() == nil; i++ {
			one()
		}
	}
	r.Seconds = time.Since(r.Started).Seconds()
	slices.Sort(lat)
	slices.Sort(r.Failures)
	if len(lat) > 0 {
		r.P50, r.P99 = lat[len(lat)/2], lat[len(lat)*99/100]
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

type answer struct{ Host, Client string }

// asker returns how one request is made; with keep on connections that stay.
func asker(u *url.URL, keep bool) (func(context.Context) (answer, error), error) {
	var d net.Dialer
	switch u.Scheme {
	case "http":
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: !keep, MaxIdleConnsPerHost: 16, DialContext: d.DialContext}}
		return func(ctx context.Context) (a answer, err error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
			if err != nil {
				return a, err
			}
			resp, err := client.Do(req)
			if err != nil {
				return a, err
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				return a, err
			}
			if resp.StatusCode != http.StatusOK {
				return a, fmt.Errorf("status %d", resp.StatusCode)
			}
			_ = json.Unmarshal(b, &a) // another server's answer counts, too
			return a, nil
		}, nil
	case "udp", "tcp":
		if keep {
			return nil, fmt.Errorf("-keepalive: use it with http, not %s", u.Scheme)
		}
		return func(ctx context.Context) (a answer, err error) {
			c, err := d.DialContext(ctx, u.Scheme, u.Host)
			if err != nil {
				return a, err
			}
			defer c.Close()
			dl, _ := ctx.Deadline()
			_ = c.SetDeadline(dl)
			if _, err := c.Write([]byte("hello\n")); err != nil {
				return a, err
			}
			if u.Scheme == "udp" {
				buf := make([]byte, 64<<10)
				n, err := c.Read(buf)
				if err != nil {
					return a, err
				}
				return a, json.Unmarshal(buf[:n], &a)
			}
			b, err := bufio.NewReader(c).ReadBytes('\n')
			if err != nil {
				return a, err
			}
			return a, json.Unmarshal(b, &a)
		}, nil
	}
	return nil, fmt.Errorf("scheme %q: use http, udp or tcp", u.Scheme)
}

// short is an error without what differs from request to request.
func short(err error) string {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return "name: " + dns.Err
	case errors.Is(err, context.DeadlineExceeded), os.IsTimeout(err):
		return "timeout"
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		return no.Error()
	}
	for {
		in := errors.Unwrap(err)
		if in == nil {
			return err.Error()
		}
		err = in
	}
}
