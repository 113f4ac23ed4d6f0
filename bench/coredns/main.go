// Coredns is a CoreDNS with nothing but the plugins hosts and file, which
// scripts/bench measures beside Shoal's name server. It is a module of its own,
// so that Shoal needs none of what CoreDNS needs.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/file"
	_ "github.com/coredns/coredns/plugin/hosts"
)

func main() {
	dnsserver.Directives = []string{"bind", "hosts", "file"}
	coremain.Run()
}
