package state

import (
	"errors"
	"slices"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

func taskOn(c *cluster, name string, nets ...spec.NetworkAttachment) error {
	return c.apply(Command{CreateTask: &CreateTask{ID: c.id("tas"), Name: name, Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: nets, Created: c.now}}).Err
}

func on(network string, aliases ...string) spec.NetworkAttachment {
	return spec.NetworkAttachment{Network: network, Aliases: aliases}
}

// Names that a resolver can't tell apart are one name, of whatever kind.
func TestNamesFoldCase(t *testing.T) {
	c := newCluster(t)
	c.join("Node1")
	c.network("App", "")
	c.service(svcSpec("Web", 0, "App"))
	if err := taskOn(c, "C1", on("App")); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"name aPP is taken by network App: names are the same in upper and lower case":      c.apply(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "aPP"}}}).Err,
		"name Host is taken by network host: names are the same in upper and lower case":    c.apply(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "Host"}}}).Err,
		"name web is taken by service Web: names are the same in upper and lower case":      c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: svcSpec("web", 1)}}).Err,
		"name c1 is taken by task C1: names are the same in upper and lower case":           taskOn(c, "c1"),
		"name node1 is taken by node Node1: names are the same in upper and lower case":     c.apply(Command{UpsertNode: &UpsertNode{Node: simSpec("other", "node1", "", 9)}}).Err,
		"task WEB: service Web has the name WEB on network App: choose another":             taskOn(c, "WEB", on("App")),
		"task x: service Web has the name web on network App: choose another":               taskOn(c, "x", on("App", "web")),
		"task tasks.web: service Web has the name tasks.web on network App: choose another": taskOn(c, "tasks.web", on("App")),
		"task web.2: service Web has the name web.2 on network App: choose another":         taskOn(c, "web.2", on("App")),
	} {
		if err == nil || err.Error() != name || !errors.Is(err, ErrExists) {
			t.Errorf("got  %v\nwant %s", err, name)
		}
	}
	// A name that is free again may be taken in any case.
	c.must(Command{StopTask: &StopTask{Ref: "C1", Remove: true}})
	c.must(Command{RemoveService: &RemoveService{Ref: "Web"}})
	c.settle()
	if err := taskOn(c, "c1", on("App", "web")); err != nil {
		t.Fatal(err)
	}
	c.checkReplay()
}

// A service and a task can't share a name on one network, whichever comes first and
// however it comes; on different networks, and as an alias of both, they can.
func TestServiceAndTaskClash(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	c.network("a", "")
	c.network("b", "")
	for _, err := range []error{taskOn(c, "web", on("a", "db")), taskOn(c, "client", on("b", "shop"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	create := func(name string, nets ...spec.NetworkAttachment) error {
		sp := svcSpec(name, 1)
		sp.Networks = nets
		return c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: sp}}).Err
	}
	connect := func(n, target string, aliases ...string) error {
		return c.apply(Command{ConnectNetwork: &ConnectNetwork{Network: n, Target: target, Aliases: aliases}}).Err
	}
	const rm = ": choose another name, or remove the task with 'shoal rm -f "
	refused := func(err error, want string) {
		t.Helper()
		if err == nil || err.Error() != want || !errors.Is(err, ErrExists) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	refused(create("web", on("a")), "service web: task web has the name web on network a"+rm+"web'")
	refused(create("db", on("b"), on("a")), "service db: task web has the name db on network a"+rm+"web'")
	refused(create("api", on("a", "WEB")), "service api: task web has the name web on network a"+rm+"web'")
	if err := create("web", on("b", "db")); err != nil { // another network
		t.Fatal(err)
	}
	if err := create("store", on("b", "SHOP"), on("a", "db")); err != nil { // aliases are shared
		t.Fatal(err)
	}
	c.settle()
	refused(connect("b", "client", "x"), "task client is on network b already")
	// "web" is a service and a task: the service is meant.
	if err := connect("a", "web"); err == nil || err.Error() != "service web: task web has the name web on network a"+rm+"web'" {
		t.Error(err)
	}
	id := c.s.taskNames["web"]
	refused(connect("b", id), "service web has the name web on network b: choose another")
	refused(connect("a", "store"), "service store is on network a already")
	sp := c.s.services[c.s.svcNames["store"]].Spec.Clone()
	sp.Networks[1].Aliases = []string{"web"}
	refused(c.apply(Command{UpdateService: &UpdateService{Ref: "store", Spec: &sp}}).Err, "service store: task web has the name web on network a"+rm+"web'")
	// A task that has ended is called by its name no more.
	c.must(Command{StopTask: &StopTask{Ref: "web"}})
	if err := connect("a", "web"); !errors.Is(err, ErrEnding) {
		t.Errorf("while the task ends: %v", err)
	}
	c.settle()
	if err := connect("a", "web"); err != nil {
		t.Error(err)
	}
	c.settle()
	c.checkReplay()
}

// A full ID goes before a name, a name before the beginning of an ID.
func TestRefs(t *testing.T) {
	c := newCluster(t)
	n1 := c.join("n1")
	first := c.network("first", "")
	c.network(first.ID, "") // named as the ID of the first
	c.network("net", "")    // all IDs begin so
	for ref, want := range map[string]string{first.ID: "first", "net": "net", "first": "first"} {
		if n, err := c.s.Network(ref); err != nil || n.Name != want {
			t.Errorf("network %s: %v %v, want %s", ref, n.Name, err, want)
		}
	}
	web := c.service(svcSpec("web", 1))
	c.service(svcSpec(web.ID, 1))
	if v, err := c.s.Service(web.ID); err != nil || v.Spec.Name != "web" {
		t.Error(v.Spec.Name, err)
	}
	if err := taskOn(c, "c1"); err != nil {
		t.Fatal(err)
	}
	id := c.s.taskNames["c1"]
	if err := taskOn(c, id); err != nil {
		t.Fatal(err)
	}
	if x, err := c.s.Task(id); err != nil || x.Name != "c1" {
		t.Error(x.Name, err)
	}
	c.must(Command{UpsertNode: &UpsertNode{Node: simSpec("nod-other", n1.id, "", 5)}})
	if n, err := c.s.Node(n1.id); err != nil || n.Name != "n1" {
		t.Error(n.Name, err)
	}
	// connect takes tasks and services: here the ID of a task is a service's name.
	c.network("more", "")
	other := c.network("other", "")
	c.service(svcSpec(id, 1, other.ID))
	r := c.must(Command{ConnectNetwork: &ConnectNetwork{Network: "more", Target: id}})
	if r.Task == nil || r.Task.ID != id {
		t.Errorf("connected %+v", r)
	}
	if r := c.must(Command{RemoveNetwork: &RemoveNetwork{Ref: first.ID}}); r.Network.Name != "first" {
		t.Errorf("removed %s", r.Network.Name)
	}
	if r := c.must(Command{RemoveNetwork: &RemoveNetwork{Ref: first.ID}}); r.Network.Name != first.ID {
		t.Errorf("removed %s", r.Network.Name)
	}
}

func TestNamesThatAreAddresses(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	create := func(fn func(*spec.ServiceSpec)) error {
		sp := svcSpec("web", 1)
		fn(&sp)
		return c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: sp}}).Err
	}
	run := func(name string, ts spec.TaskSpec, nets ...spec.NetworkAttachment) error {
		ts.Command = []string{"x"}
		return c.apply(Command{CreateTask: &CreateTask{ID: c.id("tas"), Name: name, Spec: ts, Networks: nets}}).Err
	}
	if err := run("ok", spec.TaskSpec{}); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"service":       create(func(s *spec.ServiceSpec) { s.Name = "123" }),
		"service alias": create(func(s *spec.ServiceSpec) { s.Networks = []spec.NetworkAttachment{on("default", "0x7f")} }),
		"service host":  create(func(s *spec.ServiceSpec) { s.Task.Hostname = "127.1" }),
		"service link":  create(func(s *spec.ServiceSpec) { s.Task.Links = []string{"db:7"} }),
		"extra host":    create(func(s *spec.ServiceSpec) { s.Task.ExtraHosts = []string{"1.2:10.0.0.1"} }),
		"task":          run("1.2", spec.TaskSpec{}),
		"task alias":    run("x", spec.TaskSpec{}, on("default", "0177.1")),
		"task host":     run("x", spec.TaskSpec{Hostname: "0"}),
		"network":       c.apply(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "10"}}}).Err,
		"node":          c.apply(Command{UpsertNode: &UpsertNode{Node: simSpec("other", "10.0.0.1", "", 9)}}).Err,
		"connect":       c.apply(Command{ConnectNetwork: &ConnectNetwork{Network: c.network("app", "").ID, Target: "ok", Aliases: []string{"1"}}}).Err,
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// What a cluster has from before a rule stays when its log is read again, can be
// changed and removed, and is told of.
func TestRulesOfBefore(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	c.settle()
	old := func(cmd Command) {
		t.Helper()
		b, err := Encode(cmd)
		if err != nil {
			t.Fatal(err)
		}
		c.log = append(c.log, b)
		if r := c.s.Apply(uint64(len(c.log)), cmd); r.Err != nil {
			t.Fatal(r.Err)
		}
		checkInvariants(t, c.s)
	}
	app := spec.Network{ID: c.id("net"), Name: "app"}
	old(Command{CreateNetwork: &CreateNetwork{Network: app}})
	old(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "APP"}}})
	old(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: app.ID}}})
	old(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: svcSpec("web", 1, "app")}})
	old(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: svcSpec("WEB", 1, "app")}})
	old(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: svcSpec("123", 1, "app")}})
	old(Command{CreateTask: &CreateTask{ID: c.id("tas"), Name: "web", Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: []spec.NetworkAttachment{on("app")}}})
	// By the rules of its time this names the network that has the ID as its name.
	old(Command{RemoveNetwork: &RemoveNetwork{Ref: app.ID}})
	c.settle()
	if _, err := c.s.Network("app"); err != nil {
		t.Fatal(err)
	}
	c.scale("WEB", 2)
	c.scale("123", 2)
	sp := c.s.services[c.s.svcNames["web"]].Spec.Clone()
	sp.Task.Env = []string{"V=2"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	c.settle()
	got := Clashes(c.s.Nodes(), c.s.Networks(), c.s.Services(), c.s.Tasks(TaskFilter{All: true}))
	want := []string{
		"networks APP and app have one name but for upper and lower case: each gives all of them",
		"service WEB and task web both have the name web on network app",
		"service web and task web both have the name web on network app",
		"services WEB and web have one name but for upper and lower case: each gives all of them",
		"the name of service 123 is the address 0.0.0.123 to programs",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	c.checkReplay(len(c.log) / 2)
	c.must(Command{RemoveService: &RemoveService{Ref: "WEB"}})
	c.settle()
	c.checkReplay()
}
