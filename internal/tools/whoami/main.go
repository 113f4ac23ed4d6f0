// Whoami is a small server for tests and demonstrations: it says who it is and
// who asks.
//
//	whoami -http :80 -udp :9000 -tcp :9000
//
// HTTP answers GET / with a JSON object; UDP answers each datagram, TCP each
// line, with the same object on one line. SIGTERM lets requests end.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// answer is what every protocol says.
type answer struct {
	Host   string `json:"host"`
	Server string `json:"server"` // address the request came to
	Client string `json:"client"` // address it came from
	Path   string `json:"path,omitempty"`
}

func main() {
	httpAddr := flag.String("http", ":80", "HTTP address; empty: none")
	udpAddr := flag.String("udp", ":9000", "UDP address; empty: none")
	tcpAddr := flag.String("tcp", ":9000", "TCP line echo address; empty: none")
	flag.Parse()
	if err := run(*httpAddr, *udpAddr, *tcpAddr); err != nil {
		fmt.Fprintln(os.Stderr, "whoami:", err)
		os.Exit(1)
	}
}

func run(httpAddr, udpAddr, tcpAddr string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	// Datagrams and lines first: who waits for the HTTP port finds all of them.
	if udpAddr != "" {
		pc, err := net.ListenPacket("udp", udpAddr)
		if err != nil {
			return err
		}
		go func() {
			buf := make([]byte, 64<<10)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				b, _ := json.Marshal(answer{Host: host, Server: pc.LocalAddr().String(), Client: from.String()})
				_, _ = pc.WriteTo(b, from)
			}
		}()
	}
	if tcpAddr != "" {
		ln, err := net.Listen("tcp", tcpAddr)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go lines(c, host)
			}
		}()
	}
	if httpAddr == "" {
		<-ctx.Done()
		return nil
	}
	srv := &http.Server{Addr: httpAddr, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		// /bytes/N is a download of N bytes.
		if n, err := strconv.Atoi(r.PathValue("n")); err == nil {
			w.Header().Set("Content-Length", strconv.Itoa(n))
			chunk := make([]byte, 64<<10)
			for ; n > 0; n -= len(chunk) {
				if _, err := w.Write(chunk[:min(n, len(chunk))]); err != nil {
					return
				}
			}
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer{Host: host, Server: local.String(), Client: r.RemoteAddr, Path: r.URL.Path})
	})}
	mux := http.NewServeMux()
	mux.Handle("/bytes/{n}", srv.Handler)
	mux.Handle("/", srv.Handler)
	srv.Handler = mux
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		sctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = srv.Shutdown(sctx)
	}()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return nil
}

func lines(c net.Conn, host string) {
	defer c.Close()
	sc := bufio.NewScanner(c)
	for sc.Scan() {
		b, _ := json.Marshal(answer{Host: host, Server: c.LocalAddr().String(), Client: c.RemoteAddr().String(), Path: sc.Text()})
		if _, err := c.Write(append(b, '\n')); err != nil {
			return
		}
	}
}
