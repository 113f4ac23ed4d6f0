package control

import (
	"context"
	"net"
	"net/http"
	"time"
)

// Protocols are what the API's servers speak: HTTP/1.1, and HTTP/2 without TLS
// for streams in both directions.
func Protocols() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	return p
}

func client(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{
		Protocols:   p,
		DialContext: dial,
		// A peer that vanished without a word is found out even while a
		// stream is silent.
		HTTP2:           &http.HTTP2Config{SendPingTimeout: 3 * time.Second, PingTimeout: 3 * time.Second},
		IdleConnTimeout: 30 * time.Second,
	}}
}

// UnixClient speaks HTTP/2 without TLS over a unix socket, whatever the URL's
// host.
func UnixClient(socket string) *http.Client {
	return client(func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	})
}

// TCPClient speaks HTTP/2 without TLS to other nodes.
func TCPClient() *http.Client {
	d := &net.Dialer{Timeout: 2 * time.Second}
	return client(d.DialContext)
}
